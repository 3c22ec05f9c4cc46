"""From files to records, and from records to pictures. Needs Pillow and pydantic, never torch."""

from __future__ import annotations

from ovisnb.data.record import Media, Record, RecordError, Turn

__all__ = ["Media", "Record", "RecordError", "Turn"]
