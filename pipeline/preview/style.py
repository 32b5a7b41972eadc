"""How the page looks: one style sheet, for light and dark, from 360 px of width."""

CSS = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --text: #16181d; --quiet: #626976;
  --line: #e2e5ea; --bar: #3b74d9; --bad: #b3261e; --badge: #eceff4 }
@media (prefers-color-scheme: dark) { :root { --ground: #111318; --card: #1a1d24; --text: #e9ebef;
  --quiet: #9aa2b1; --line: #2b303a; --bar: #6c9cf0; --bad: #ff8a80; --badge: #272c36 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 1360px; margin: 0 auto; padding: 28px 24px 64px }
h1 { font-size: 26px; margin: 0; letter-spacing: -.01em;
  overflow-wrap: anywhere } h2 { font-size: 19px; margin: 40px 0 2px }
p { margin: 0 } .quiet { color: var(--quiet) }
code, .key { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; font-size: 13px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 22px 0 12px }
.tile, .panel, figure { background: var(--card); border: 1px solid var(--line); border-radius: 12px }
.tile { padding: 12px 16px } .tile b { display: block; font-size: 26px; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums } .tile.bad b { color: var(--bad) }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); gap: 12px }
.panel { padding: 14px 18px 18px; display: flex; flex-direction: column }
.panel h3 { font-size: 15px; margin: 0 0 10px }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 5px 12px; align-items: center;
  font-size: 13px; font-variant-numeric: tabular-nums; margin: 0 }
.bars dt, .bars dd { margin: 0 } .bars .number { text-align: right }
.bars i { display: block; height: 9px; border-radius: 5px; background: var(--bar); min-width: 2px }
.bars .track { background: var(--badge); border-radius: 5px; height: 9px } .bars.bad i { background: var(--bad) }
.bars .quiet { grid-column: 1 / -1; margin: -4px 0 5px }
svg { display: block; width: 100%; height: 120px; flex: 1 0 120px; fill: var(--bar) }
svg line { stroke: var(--bad); stroke-width: 1; vector-effect: non-scaling-stroke }
.panels + .panel { margin-top: 12px }
.joints { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(230px, 100%), 1fr)); gap: 12px 22px }
.joints svg { height: 36px; border-bottom: 1px solid var(--line) }
.joints div { font-size: 13px; font-variant-numeric: tabular-nums } .joints b { font-weight: 600 }
.joints p { display: flex; justify-content: space-between; gap: 8px } .joints b { overflow-wrap: anywhere }
.axis { display: flex; justify-content: space-between; font-size: 12px; color: var(--quiet);
  border-top: 1px solid var(--line); padding-top: 3px; font-variant-numeric: tabular-nums }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 14px;
  margin-top: 14px; align-items: start }
figure { margin: 0; overflow: hidden; display: flex; flex-direction: column }
figure img, .missing { width: 100%; height: 260px; object-fit: contain; background: #0b0c0f; display: block;
  cursor: zoom-in }
.missing { display: grid; place-items: center; color: #c6cbd6; padding: 20px; text-align: center;
  cursor: default }
figure input { position: absolute; opacity: 0; pointer-events: none }
figure input:focus-visible + img { outline: 3px solid var(--bar); outline-offset: -3px }
figure input:checked + img { position: fixed; inset: 0; width: 100vw; height: 100vh; z-index: 9;
  cursor: zoom-out; background: rgba(5, 6, 8, .94) }
figcaption { padding: 10px 14px 13px } .key { overflow-wrap: anywhere }
.chips { display: flex; flex-wrap: wrap; gap: 5px; margin-top: 7px }
.chips span { background: var(--badge); border-radius: 999px; padding: 0 10px; font-size: 13px;
  font-variant-numeric: tabular-nums }
.chips .chosen { background: var(--bar); color: #fff; font-weight: 600 }
@media (prefers-color-scheme: dark) { .chips .chosen { color: #0b1220 } }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin-top: 12px }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 6px;
  border: 1px solid #4448; vertical-align: -1px }
.small { font-size: 13px; margin-top: 10px }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 12px } a { color: var(--bar) }
.badge { display: inline-block; border: 1px solid var(--line); border-radius: 6px; padding: 0 8px; font-size: 12px;
  font-weight: 600; margin-bottom: 5px } .badge.bad { color: var(--bad) }
"""
