"""The modules of a transformer layer, one concept per file, chosen by the type of their config."""
