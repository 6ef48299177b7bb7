"""What MoBA layers choose: block ids caught in the layers, counted, and the mass of attention that they hold."""
