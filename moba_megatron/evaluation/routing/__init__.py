"""The choices of MoBA layers: block ids captured in the layers, their counts, and the mass of attention they hold."""
