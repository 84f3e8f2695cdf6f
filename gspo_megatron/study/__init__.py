"""`gspo-megatron study` trains arms that differ in one thing from the same starts, and says what came of it."""
