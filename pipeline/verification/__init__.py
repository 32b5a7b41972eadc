"""Whether a shard dataset is whole and right: written from the format, without any code that writes it.

finding: what is wrong · versions: the JSON files · chain: all versions, what is stored, what is dropped ·
part, counts: one part and its rows · whole: each part once, and what holds across parts.
"""
