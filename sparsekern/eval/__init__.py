"""Quality: perplexity, and the texts for calibration and evaluation."""
