"""sentence-transformers' MultipleNegativesRankingLoss and its relatives (6.2)."""

from ssl_kernels.adapters._shared import classes_of

_LOSSES = "sentence_transformers.sentence_transformer.losses"
ORIGINALS = {
    "MultipleNegativesRankingLoss": f"{_LOSSES}.multiple_negatives_ranking",
    "CachedMultipleNegativesRankingLoss": f"{_LOSSES}.cached_multiple_negatives_ranking",
    "MultipleNegativesSymmetricRankingLoss": f"{_LOSSES}.multiple_negatives_symmetric_ranking",
    "CachedMultipleNegativesSymmetricRankingLoss": f"{_LOSSES}.cached_multiple_negatives_symmetric_ranking",
}
__all__ = sorted(ORIGINALS)
_OTHER = "a similarity_fct other than cos_sim and dot_score runs the library's own code, with a warning"
DIFFERENCES = {
    "MultipleNegativesRankingLoss": f"float32 under autocast (the library: bfloat16); {_OTHER}, and so do several"
    " processes with gather_across_devices; the gradient of a learned scale with query_to_query or doc_to_doc is"
    " finite (the library: NaN)",
    "CachedMultipleNegativesRankingLoss": f"the loss of all rows at once, in O(N · D); {_OTHER}",
    "MultipleNegativesSymmetricRankingLoss": "as MultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss": "as CachedMultipleNegativesRankingLoss",
}


__getattr__ = classes_of(__name__)
