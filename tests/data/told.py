"""What reading a data file is refused with."""

from __future__ import annotations

import pytest

from ovisnb.data import RecordError, read_records


def told(path) -> str:
    """The one sentence that refuses the file."""
    with pytest.raises(RecordError) as refusal:
        list(read_records(path))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)
