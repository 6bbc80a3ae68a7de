"""Search in a released database. Importing it loads neither LanceDB nor torch: each comes with its first use."""

from pipeline.query.encoder import Mixture
from pipeline.query.rerank import Diversify
from pipeline.query.searcher import Searcher

__all__ = ["Diversify", "Mixture", "Searcher"]
