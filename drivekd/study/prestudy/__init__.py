"""Before distilling: which layers and regions of a teacher each capability could be taught from."""

from drivekd.study.prestudy.prestudy import prestudy
from drivekd.study.prestudy.result import Document, Prestudy, Suggestion

__all__ = ["Document", "Prestudy", "Suggestion", "prestudy"]
