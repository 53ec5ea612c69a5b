"""Score rules, the score table and its files, the record of a run, how firm a rank is, racing."""
