#!/bin/sh
# In the place of the official image's docker-entrypoint.sh, which no registry gives us here: as far as
# the manifests rely on it. A first start on an empty directory makes a database and runs what is in
# /docker-entrypoint-initdb.d; then the command takes over.
set -eu

directory=$(mariadbd --verbose --help 2>/dev/null | sed -n 's/^datadir  *//p')
socket=$(mariadbd --verbose --help 2>/dev/null | sed -n 's/^socket  *//p')
if [ ! -d "$directory/mysql" ]; then
  mkdir -p "$directory/mysql"
  share=/usr/share/mysql
  {
    echo 'use mysql;'
    cat $share/mariadb_system_tables.sql $share/mysql_system_tables.sql \
      $share/mariadb_system_tables_data.sql $share/mysql_system_tables_data.sql 2>/dev/null || true
  } | mariadbd --skip-log-bin --bootstrap --silent-startup
  mariadbd --skip-networking --skip-log-bin &
  server=$!
  until mariadb --user=root --socket="$socket" --execute='SELECT 1' >/dev/null 2>&1; do
    kill -0 $server
    sleep 0.1
  done
  for script in /docker-entrypoint-initdb.d/*.sql; do
    mariadb --user=root --socket="$socket" <"$script"
  done
  kill -TERM $server
  wait $server
fi
exec "$@"
