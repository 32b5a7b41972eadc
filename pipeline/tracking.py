"""Runs and metrics: a handful of functions of plain types over MLflow.

The one importer of mlflow, with model_registry.py and pyfunc.py, which MLflow itself runs. It takes seconds to import,
so it is imported when first needed. It knows no Ray: another process goes on with a run by its id.

Opening a run raises `TrackingError` where MLflow can't be used. What is logged to an open run is never worth losing a
job for: it waits until MLflow is back, and a warning says so.
"""

import contextlib
import json
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import numpy.typing as npt

from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError, DataError
from pipeline.metrics_buffer import LoggedMetric, MetricsBuffer

logger = logging.getLogger("pipeline.tracking")

# MLflow's own defaults wait for many minutes. Two more attempts find a server that restarts; one that isn't
# there is known after seconds, one that takes connections and stays silent after a minute and a half.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # requirements are given explicitly, whatever folder the job runs in
}
# A training that logs every few seconds mustn't wait each time for a server that isn't there: after an attempt that
# failed none is made for so long, or longer, so that waiting takes at most this share of the time.
PAUSE_S = 60
MAX_SHARE = 0.05
MAX_OTHERS = 50  # pictures, tags and the like that wait; a sheet of pictures is half a megabyte
MAX_METRICS = 1000  # MLflow's own limit for one request
# MLflow's words for what no later attempt would mend; all else, also a proxy's 404 or 403, may pass
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}
MAX_DIGEST = 36  # characters in MLflow's tables
MAX_BATCH = 100  # parameters or tags in one request


class TrackingError(OSError):
    """MLflow could not be used: the message names the place, what it said, and the remedy."""


class TrackingRefused(TrackingError):
    """MLflow was there, and won't take it, now or later."""


class Run:
    """An open run, or the null run that takes the same calls and keeps nothing (`run_id`, `url`: None); or no more than
    its numbers (`numbers_wait`), for who stores them.

    While MLflow can't be reached what is logged waits: all metrics, within reason, and some of everything else. It is
    sent when MLflow is back, at the latest when the run is closed.
    """

    def __init__(self, client: Any = None, *, location: str = "", run_id: str | None = None,
                 url: str | None = None, connect: Callable[[], Any] | None = None, numbers_wait: bool = False) -> None:
        self._client = client
        self._connect = connect
        self._location = location
        self.run_id = run_id
        self.url = url
        self.ended = False  # and MLflow knows it
        self._numbers_wait = numbers_wait or run_id is not None
        self._metrics = MetricsBuffer()
        self._others: deque[tuple[str, Callable[[Any, str], None]]] = deque()
        self._lost: list[str] = []
        self._away_since: float | None = None
        self._again_at = 0.0

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Keep settings, nested ones as `a.b`. What the run already has stays: a resumed run began so."""
        def send(client: Any, run_id: str) -> None:
            from mlflow.entities import Param

            known = client.get_run(run_id).data.params
            new = [Param(name, str(value)) for name, value in _flat(params) if name not in known]
            for start in range(0, len(new), MAX_BATCH):
                client.log_batch(run_id, params=new[start : start + MAX_BATCH])

        self._send("parameters", send)

    def log_metrics(self, metrics: Mapping[str, float | None], *, step: int = 0) -> None:
        """Keep numbers at a step; those that are None don't exist and are left out."""
        now_ms = int(time.time() * 1000)
        self.log_later(LoggedMetric(name, float(value), step, now_ms)
                       for name, value in metrics.items() if value is not None)
        self.flush()

    def log_later(self, metrics: Iterable[LoggedMetric]) -> None:
        """Let numbers wait for the next `flush`: what another process couldn't send."""
        if self._numbers_wait:
            self._metrics.add(metrics)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a tag of the same name is replaced."""
        def send(client: Any, run_id: str) -> None:
            from mlflow.entities import RunTag

            client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

        self._send("tags", send)

    def log_dataset(self, name: str, uri: str, *, digest: str, context: str) -> None:
        """Say which data the run read: address, digest, and in which role (`training`, `validation`, ...)."""
        def send(client: Any, run_id: str) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            kind = "s3" if uri.startswith("s3://") else "local"
            source = json.dumps({"uri": without_credentials(uri)})
            dataset = Dataset(name, digest[:MAX_DIGEST], source_type=kind, source=source)
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

        self._send(f"dataset {name}", send)

    def log_picture(self, name: str, image_bgr: npt.NDArray[np.uint8]) -> None:
        """Keep a picture [H, W, 3] uint8 BGR as the artifact `name`, which ends in .jpg or .png."""
        rgb = np.ascontiguousarray(image_bgr[..., ::-1])
        self._send(name, lambda client, run_id: client.log_image(run_id, rgb, artifact_file=name))

    def log_text(self, name: str, text: str) -> None:
        """Keep a text as the artifact `name`."""
        self._send(name, lambda client, run_id: client.log_text(run_id, text, name))

    def waiting_metrics(self) -> list[LoggedMetric]:
        """The numbers that MLflow doesn't have yet."""
        return list(self._metrics.waiting)

    def flush(self, *, now: bool = False) -> None:
        """Send what waits. A while after an attempt that failed nothing is tried again, except `now`."""
        if self.run_id is None or (time.monotonic() < self._again_at and not now):
            return
        while self._metrics.waiting:
            if not self._attempt("metrics", self._send_metrics):
                return
        while self._others and self._attempt(*self._others[0]):
            self._others.popleft()

    def close(self, *, end: Callable[[Any, str], None] | None = None) -> None:
        """Send what waits, and the end of the run; say what is lost with this process."""
        if self.run_id is None:
            return
        if end is not None:
            self._others.append(("the end of the run", end))
        if self._others or self._metrics.waiting:
            self.flush(now=True)
        self.ended = end is not None and not self._others
        lost = [*self._lost, *(what for what, _ in self._others)]
        if self._metrics.waiting or self._metrics.dropped or lost:
            logger.warning("MLflow at %s is not back. It lacks %d metrics%s", without_credentials(self._location),
                           len(self._metrics.waiting) + self._metrics.dropped,
                           "".join(f", {what}" for what in lost))

    def _send(self, what: str, send: Callable[[Any, str], None]) -> None:
        if self.run_id is None:
            return
        self._others.append((what, send))
        if len(self._others) > MAX_OTHERS:
            self._lost.append(self._others.popleft()[0])
        self.flush()

    def _send_metrics(self, client: Any, run_id: str) -> None:
        some = self._metrics.first(MAX_METRICS)
        try:
            with mlflow_errors(self._location):
                _log_batch(client, run_id, some)
        except TrackingRefused:
            self._send_those_taken(client, run_id, some)
        self._metrics.forget(len(some))

    def _send_those_taken(self, client: Any, run_id: str, metrics: Iterable[LoggedMetric]) -> None:
        """One by one: the others shan't be lost with a wrong one."""
        refused = []
        for metric in metrics:
            try:
                with mlflow_errors(self._location):
                    _log_batch(client, run_id, [metric])
            except TrackingRefused as error:
                refused.append((metric, error))
        if refused:
            metric, why = refused[0]
            logger.warning("not logged (%d metrics, such as %s of step %d): %s", len(refused), metric.name, metric.step,
                           why)

    def _attempt(self, what: str, send: Callable[[Any, str], None]) -> bool:
        """Whether it is dealt with: sent, or refused for good. Otherwise MLflow isn't there, and gets some rest."""
        began = time.monotonic()
        try:
            with mlflow_errors(self._location):
                if self._client is None and self._connect is not None:
                    self._client = self._connect()
                send(self._client, str(self.run_id))
        except TrackingRefused as error:
            logger.warning("not logged (%s): %s", what, error)
        except TrackingError as error:
            self._rest(error, took_s=time.monotonic() - began)
            return False
        if self._away_since is not None:
            logger.info("MLflow is back after %.0f s: what has waited is sent", time.monotonic() - self._away_since)
            self._away_since, self._again_at = None, 0.0
        return True

    def _rest(self, error: TrackingError, *, took_s: float) -> None:
        now = time.monotonic()
        self._again_at = now + max(PAUSE_S, took_s / MAX_SHARE)
        if self._away_since is None:
            self._away_since = now - took_s
            logger.warning("The job goes on, and what is logged waits until MLflow is back. %s", error)


def _log_batch(client: Any, run_id: str, metrics: Iterable[LoggedMetric]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(each.name, each.value, each.time_ms, each.step) for each in metrics])


# --- where MLflow is ---------------------------------------------------------------------------------------


def located(tracking: TrackingConfig) -> TrackingConfig:
    """The same settings with `uri` written out, so that a worker in another folder means the same place.

    Without a `uri`: MLFLOW_TRACKING_URI, else mlflow.db in the working directory. A relative SQLite path is
    made absolute.
    """
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{os.path.abspath(uri.removeprefix('sqlite:///'))}"
    return tracking.model_copy(update={"uri": uri})


def without_credentials(text: str) -> str:
    """The text with user, password and query taken out of every address in it."""
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+", lambda match: _bare_address(match[0]), text)


def _bare_address(uri: str) -> str:
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", "")) if host else uri.partition("?")[0]


# --- runs --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_run(tracking: TrackingConfig, *, name: str, run_id: str | None = None, ends: bool | None = None,
             system_metrics: bool = False, must_answer: bool = True, numbers_wait: bool = False) -> Iterator[Run]:
    """A run to log to, new or continued by `run_id`; the null run where tracking is off.

    A new run ends with the block: FINISHED, FAILED after an exception, KILLED after an interrupt. A continued
    one is left as it is, since it is another process's to end; `ends=True` takes it over (a resuming job).
    system_metrics  also log this machine's CPU, memory, disk, network and GPU, every 10 s, as `system/...`; they end
                    when MLflow doesn't answer
    must_answer     False, for a run that goes on: where MLflow can't be reached now, it may be later
    numbers_wait    where tracking is off, what is logged as a number can still be had by `waiting_metrics`
    Raises TrackingError where MLflow can't be reached or doesn't know the run.
    """
    if not tracking.enabled:
        yield Run(numbers_wait=numbers_wait)
        return
    owned = ends if ends is not None else run_id is None
    tracking = located(tracking)
    try:
        run = _start(tracking, name=name, run_id=run_id, owned=owned)
    except TrackingError as error:
        if must_answer or run_id is None:
            raise
        run = Run(location=str(tracking.uri), run_id=run_id, connect=lambda: open_client(tracking))
        run._rest(error, took_s=0.0)
    logger.info("tracked as run %s", run.url or f"{run.run_id} at {without_credentials(str(tracking.uri))}")
    with _terminated(run, owned=owned), _system_metrics(run, enabled=system_metrics):
        yield run


def _start(tracking: TrackingConfig, *, name: str, run_id: str | None, owned: bool) -> Run:
    client = open_client(tracking)
    uri = str(tracking.uri)
    with mlflow_errors(uri):
        if run_id is None:
            entity = client.create_run(_experiment_id(client, tracking), run_name=name)
        else:
            if owned:
                client.update_run(run_id, status="RUNNING")
            entity = client.get_run(run_id)
        return Run(client, location=uri, run_id=entity.info.run_id, url=_run_url(uri, entity.info))


@contextlib.contextmanager
def _terminated(run: Run, *, owned: bool) -> Iterator[None]:
    def end(status: str) -> None:
        run.close(end=(lambda client, run_id: client.set_terminated(run_id, status)) if owned else None)

    try:
        yield
    except KeyboardInterrupt:
        end("KILLED")
        raise
    except BaseException:
        end("FAILED")
        raise
    end("FINISHED")


@contextlib.contextmanager
def _system_metrics(run: Run, *, enabled: bool) -> Iterator[None]:
    if not enabled:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # MLflow's thread would say at each end that the run it looked for isn't there; ours is said once, by the run
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    monitor: Any = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
        run.run_id, resume_logging=True, tracking_uri=run._location)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def knows_run(run_id: str, *, tracking: TrackingConfig) -> bool:
    """Whether MLflow has this run; False where tracking is off. TrackingError if MLflow can't be reached."""
    if not tracking.enabled:
        return False
    tracking = located(tracking)
    client = open_client(tracking)
    from mlflow.exceptions import MlflowException

    with mlflow_errors(str(tracking.uri)):
        try:
            client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
    return True


def open_client(tracking: TrackingConfig) -> Any:
    """MLflow's client, with our patience instead of its own."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # it prints each run's address as it was given, with user and password: whatever is set, not here
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    # importing takes 2 to 3 s, and reads the environment
    import mlflow

    for noisy in ("mlflow.store.db.utils", "alembic", "mlflow.system_metrics"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with mlflow_errors(str(tracking.uri)):
        return mlflow.MlflowClient(tracking.uri)


def _experiment_id(client: Any, tracking: TrackingConfig) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(tracking.experiment)
    if found is None:
        # two jobs may begin at once: whoever comes second takes the first one's
        with contextlib.suppress(MlflowException):
            client.create_experiment(tracking.experiment, _artifact_folder(str(tracking.uri)))
        found = client.get_experiment_by_name(tracking.experiment)
    if found is None or found.lifecycle_stage != "active":
        raise ConfigError(f"the experiment {tracking.experiment!r} can't be used at "
                          f"{without_credentials(str(tracking.uri))}: it was deleted, or may not be created. "
                          "Restore it, or --set tracking.experiment=another.")
    return str(found.experiment_id)


def _artifact_folder(uri: str) -> str | None:
    """Beside an SQLite file, whatever folder a process works in; a server decides by itself (None)."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).parent / "mlruns").as_uri()


def _run_url(uri: str, info: Any) -> str | None:
    if not uri.startswith(("http://", "https://")):
        return None
    return f"{without_credentials(uri).rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}"


@contextlib.contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """Whatever MLflow raises, as a TrackingError without a cause: its own errors repeat passwords in URIs."""
    try:
        yield
    except (ConfigError, DataError, TrackingError):
        raise
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        kind = TrackingRefused if getattr(error, "error_code", None) in REFUSALS else TrackingError
        raise kind(
            f"MLflow at {without_credentials(uri)} could not be used: {without_credentials(first_line).rstrip('.')}. "
            "Start the server or correct tracking.uri (MLFLOW_TRACKING_URI), or go without: "
            "--set tracking.enabled=false.") from None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
