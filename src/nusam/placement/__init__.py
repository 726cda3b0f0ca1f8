"""Where ε lives during the descent: in the weights or in the forward."""
