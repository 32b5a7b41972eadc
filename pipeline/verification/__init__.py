"""Whether a shard dataset is whole and right: written from the format, without any code that writes it.

finding: what is wrong · reading: objects, JSON, Parquet that can't be trusted · run, plan: what was to be written ·
keys: across parts · versions: the JSON files · chain: all versions, what is stored, what is dropped · part, counts: one
part and its rows · whole: each part once, and what holds across parts.
"""
