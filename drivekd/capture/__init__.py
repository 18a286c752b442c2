"""Queries and keys of chosen decoder layers, taken while a Hugging Face model runs."""

from drivekd.capture.attention import AttentionCapture, capture_attention
from drivekd.capture.records import CapturedAttention, CapturedLayer

__all__ = ["AttentionCapture", "CapturedAttention", "CapturedLayer", "capture_attention"]
