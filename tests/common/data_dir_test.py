"""The data directory: what is set here before what the environment says, each thread for itself."""

import threading

from axlearn.common.data_dir import get_data_dir, set_data_dir


def test_the_innermost_setting_wins_over_the_environment(monkeypatch):
    monkeypatch.delenv("DATA_DIR", raising=False)
    assert get_data_dir() is None
    monkeypatch.setenv("DATA_DIR", "/env")
    assert get_data_dir() == "/env"
    with set_data_dir("/outer"):
        with set_data_dir(None):
            assert get_data_dir() is None
        assert get_data_dir() == "/outer"
    assert get_data_dir() == "/env"


def test_a_setting_is_of_its_thread(monkeypatch):
    monkeypatch.setenv("DATA_DIR", "/env")
    seen = []
    with set_data_dir("/here"):
        thread = threading.Thread(target=lambda: seen.append(get_data_dir()))
        thread.start()
        thread.join()
    assert seen == ["/env"]
