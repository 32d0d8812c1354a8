"""Networks that are not sampled themselves: the U-Net inside the DDPM, the digit classifier, and checks of their configs."""
