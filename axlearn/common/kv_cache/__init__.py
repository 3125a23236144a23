"""Keys and values of the past, kept for incremental decoding.

`base_kv_cache` is the interface, `kv_cache` keeps everything, `sliding_window_kv_cache` the last positions.
"""
