"""What the commands do: one file a command, one public function, one frozen result."""
