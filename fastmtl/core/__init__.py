"""What everything else stands on, without any mathematics: the choice of a backend, ops and their schemas, memory."""
