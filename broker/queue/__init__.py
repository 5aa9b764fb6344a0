"""Operations on requests and their streams: publish, claim, reply, settle, redeliver, dead-letter."""
