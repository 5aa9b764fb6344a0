"""What happens to requests on their streams: publish, claim, reply, settle, redeliver, dead-letter."""
