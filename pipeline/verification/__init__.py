"""Whether a dataset is whole and right: written from the formats, without any code that writes them.

finding: what is wrong · reading: objects, JSON, Parquet that can't be trusted · run, plan: what was to be written ·
keys: across parts.
Shard datasets: versions: the JSON files · chain: all versions, what is stored, what is dropped · part, counts: one part
and its rows · whole: each part once, and what holds across parts.
Keypoint datasets: keypoint_output: how it was begun and sealed, what is stored · keypoint_part, keypoint_rows: one part
and its rows · keypoint_whole: each part once, and what holds across parts.
"""
