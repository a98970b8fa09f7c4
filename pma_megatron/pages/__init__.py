"""A page of HTML about a merge, scores, a forecast or recoveries; needs the `plots` extra."""
