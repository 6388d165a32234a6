"""``fcmae report``: one page that shows runs, without a network and from their folders alone."""
