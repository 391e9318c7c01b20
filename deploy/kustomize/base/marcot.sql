-- Run once, by the image's entrypoint, when it makes a new database. A clone brings the account along.
-- The donor is known by its user id, through the socket that it shares with the server: no password.
CREATE USER IF NOT EXISTS mysql@localhost IDENTIFIED VIA unix_socket;
-- SELECT is for a recipient that supervises the server: it reads a row of each table of a clone.
GRANT SELECT, RELOAD, BINLOG MONITOR, PROCESS, SLAVE MONITOR ON *.* TO mysql@localhost;
