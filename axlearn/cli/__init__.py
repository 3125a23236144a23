"""The `axlearn` command: each verb is a file."""
