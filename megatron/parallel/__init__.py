"""One model over many ranks: process groups, sharded layers, random streams."""
