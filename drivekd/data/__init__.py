"""Driving question-answer records: reading, writing, checking, encoding, batching."""

from drivekd.data.check import Problem, check_records
from drivekd.data.collate import Collator, Route, collate_features
from drivekd.data.encode import Encoder, ProcessorEncoder, SingleTileEncoder
from drivekd.data.records import Message, Record, load_records, save_records

__all__ = [
    "Collator",
    "Encoder",
    "Message",
    "Problem",
    "ProcessorEncoder",
    "Record",
    "Route",
    "SingleTileEncoder",
    "check_records",
    "collate_features",
    "load_records",
    "save_records",
]
