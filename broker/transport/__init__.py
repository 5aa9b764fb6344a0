"""The connection to a Redis server: connecting, commands, the RESP reader, the server's clock."""
