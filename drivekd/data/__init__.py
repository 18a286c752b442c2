"""Driving question-answer records: reading, writing, checking."""

from drivekd.data.records import Message, Record, load_records, save_records

__all__ = [
    "Message",
    "Record",
    "load_records",
    "save_records",
]
