"""Post-training quantisation of a trained model with nvidia-modelopt."""
