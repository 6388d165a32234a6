"""``fcmae study``: what pretraining gains on your data, by the number of labels."""
