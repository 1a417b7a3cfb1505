"""A lossless, columnar, crash-safe store of per-token arrays.

Knows numpy, zarr, numcodecs and pyarrow; knows nothing of torch, models, losses or of what the numbers mean.
"""
