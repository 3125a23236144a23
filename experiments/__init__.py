"""Recipes: functions that return trainer configs. They import as `axlearn.experiments.*`."""

if __name__ != "axlearn.experiments":
    raise ImportError(
        f"This package was imported as {__name__!r}; import it as 'axlearn.experiments', because under "
        "the short name every module in it would exist twice."
    )
