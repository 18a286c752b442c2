"""Studies of trained students: answering questions, statistics over seeds, reports, overlays."""
