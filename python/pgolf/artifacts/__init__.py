"""Files with weights: quantised artifacts, the scripts' bundles, state dicts; and what fits into a budget."""
