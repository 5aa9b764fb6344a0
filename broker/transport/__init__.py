"""The connection to a Redis server: dialling, commands, the RESP reader, the server's clock."""
