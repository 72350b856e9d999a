"""Training data of distillation: references, translations by a teacher or the student, held-out sentences, batches."""
