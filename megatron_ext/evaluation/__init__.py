"""Fine-tuning and evaluation of Hugging Face encoders: needs a model's folder, and nothing of the training stack."""
