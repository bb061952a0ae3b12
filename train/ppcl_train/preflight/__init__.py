"""Whether a run fits its machine, stage by stage, before it begins: from shapes alone, no weight is read."""
