"""Tables on disk: they come back as they were, and damaged, missing and half-written ones are named."""

import math
import resource
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

from ember.errors import DamagedFileError
from ember.store.frames import read_frame, write_frame


@pytest.fixture(params=["frame.parquet", "frame.csv"])
def path(request, tmp_path):
    return tmp_path / request.param


@contextmanager
def full_disk(limit: int):
    """The system refuses to let any file grow beyond ``limit`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_frames_come_back_in_the_same_bytes_each_time(path):
    """What is missing stays missing."""
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, -1.25], "c": ["δ", "x, y"], "d": [math.nan, 0.5]})
    assert write_frame(path, frame) == path
    pd.testing.assert_frame_equal(read_frame(path), frame)
    first = path.read_bytes()
    write_frame(path, frame)
    assert path.read_bytes() == first


def test_full_disk_leaves_the_old_file(path):
    write_frame(path, pd.DataFrame({"a": [1]}))
    old = path.read_bytes()
    big = pd.DataFrame({"a": np.random.default_rng(0).random(100_000)})
    with full_disk(20_000), pytest.raises(OSError, match="File too large"):
        write_frame(path, big)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97])
def test_truncated_file(path, share):
    write_frame(path, pd.DataFrame({"first": range(40), "second": 0.5}))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DamagedFileError, match=path.name):
        read_frame(path)


@pytest.mark.parametrize("content", [b"\x00" * 500, b"\xff\xfe\x8f" * 50, bytes(range(128, 256)) * 4], ids=len)
def test_garbage(path, content):
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=path.name):
        read_frame(path)


def test_missing_file(path):
    with pytest.raises(FileNotFoundError, match=path.name):
        read_frame(path)
