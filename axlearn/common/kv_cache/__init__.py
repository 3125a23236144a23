"""Keys and values of the past, kept for incremental decoding: `base_kv_cache` (the interface), `kv_cache`."""
