"""The page of a run: what its folder says, drawn and written down."""
