"""Putting a job on machines. It imports as `axlearn.launch`."""

if __name__ != "axlearn.launch":
    raise ImportError(
        f"This package was imported as {__name__!r}; import it as 'axlearn.launch', because under "
        "the short name every module in it would exist twice."
    )
