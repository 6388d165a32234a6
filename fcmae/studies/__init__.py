"""``fcmae study``: what pretraining brings on one's own data, by the number of labels."""
