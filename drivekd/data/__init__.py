"""Driving question-answer records: reading, converting, checking, encoding, batching."""

from drivekd.data.check import Checker, Problem, Split, check_records
from drivekd.data.collate import Collator, Route, collate_features
from drivekd.data.convert import Conversion, convert_records
from drivekd.data.encode import Encoder, ProcessorEncoder, SingleTileEncoder
from drivekd.data.reading import Entry, load_records, read_entries
from drivekd.data.records import Message, Record, TypeNames, save_records

__all__ = [
    "Checker",
    "Collator",
    "Conversion",
    "Encoder",
    "Entry",
    "Message",
    "Problem",
    "ProcessorEncoder",
    "Record",
    "Route",
    "SingleTileEncoder",
    "Split",
    "TypeNames",
    "check_records",
    "collate_features",
    "convert_records",
    "load_records",
    "read_entries",
    "save_records",
]
