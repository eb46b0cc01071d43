"""One model over many ranks: groups, cut layers, random streams."""
