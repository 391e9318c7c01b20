#!/usr/bin/env bash
# Shows the clone of a live MariaDB: a server with a write load is cloned over TLS, a server starts
# on the clone, is attached as a replica from the coordinates that were printed, and catches up.
#
# Needs Rust, a C compiler, openssl, mariadbd and mariadb (Debian: mariadb-server-core,
# mariadb-client-core). Needs no root. Everything is in one directory that goes at the end.
#
#   KEEP=1        leaves the directories for a look
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/tools/pair.sh

WRITERS=3
ROWS=150000

# mariadb's programs, with nothing of this machine's configuration.
server() {
  local name=$1 id=$2
  shift 2
  mariadbd --no-defaults --datadir="$work/$name" --socket="$sockets/$name.sock" \
    --pid-file="$work/$name.pid" --tmpdir="$work/tmp" --server-id="$id" --log-bin=bin \
    --innodb-buffer-pool-size=128M --innodb-flush-log-at-trx-commit=2 "$@" >"$work/$name-server.log" 2>&1 </dev/null &
  servers+=("$!")
  local deadline=$((SECONDS + 60))
  until sql "$name" 'SELECT 1' >/dev/null 2>&1; do
    kill -0 "${servers[-1]}" 2>/dev/null || die "mariadbd ended: $(tail -5 "$work/$name-server.log")"
    ((SECONDS < deadline)) || die "mariadbd does not answer after 60 s"
    sleep 0.1
  done
}

sql() {
  mariadb --no-defaults --user="${user_name:-root}" --socket="$sockets/$1.sock" --batch --skip-column-names \
    --execute="$2"
}

stop_servers() {
  local pid
  for pid in "${writers[@]}" "${servers[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${writers[@]}" "${servers[@]}"; do wait "$pid" 2>/dev/null || true; done
}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

for tool in mariadbd mariadb; do
  PATH=$PATH:/usr/sbin need "$tool" "mariadb-server-core mariadb-client-core"
done
PATH=$PATH:/usr/sbin
need openssl openssl
need python3 python3
build_binaries dev
make_work demo-mariadb
servers=() writers=()
# A socket's path has at most 107 bytes.
sockets=$(mktemp -d)
trap 'stop_servers; rm -rf "$sockets"; finish' EXIT
if ((EUID == 0)); then user=(--user=root); else user=(); fi

say "1. A MariaDB with a write load"
mkdir -p "$work/donor-data/mysql" "$work/tmp" "$work/clones" "$work/state" "$work/spool"
share=/usr/share/mysql
{
  echo 'use mysql;'
  cat $share/mariadb_system_tables.sql $share/mysql_system_tables.sql \
    $share/mariadb_system_tables_data.sql $share/mysql_system_tables_data.sql 2>/dev/null || true
} | mariadbd --no-defaults "${user[@]}" --datadir="$work/donor-data" --tmpdir="$work/tmp" \
  --bootstrap --silent-startup >"$work/bootstrap.log" 2>&1 || die "bootstrap: $(tail -3 "$work/bootstrap.log")"
port=$(free_port)
server donor-data 1 "${user[@]}" --bind-address=127.0.0.1 --port="$port"
database_password=db-$$-$RANDOM$RANDOM
sql donor-data "
  CREATE DATABASE garden;
  CREATE TABLE garden.bed (id INT PRIMARY KEY, plant VARCHAR(200)) ENGINE=InnoDB;
  CREATE TABLE garden.book (id BIGINT AUTO_INCREMENT PRIMARY KEY, at TIMESTAMP(6) DEFAULT NOW(6),
    what VARCHAR(60)) ENGINE=InnoDB;
  INSERT INTO garden.bed SELECT seq, REPEAT(MD5(seq), 6) FROM mysql.seq_1_to_$ROWS;
  CREATE USER marcot@localhost IDENTIFIED BY '$database_password';
  GRANT RELOAD, BINLOG MONITOR, PROCESS, SLAVE MONITOR ON *.* TO marcot@localhost;
  CREATE USER writer@localhost; GRANT ALL ON garden.* TO writer@localhost;
  CREATE USER replica@'127.0.0.1' IDENTIFIED BY '$database_password';
  GRANT REPLICATION SLAVE ON *.* TO replica@'127.0.0.1'"
for ((writer = 0; writer < WRITERS; writer++)); do
  user_name=writer sql donor-data "
    DELIMITER //
    BEGIN NOT ATOMIC WHILE TRUE DO
      INSERT INTO garden.book (what) VALUES (MD5(RAND()));
      SET @id = 1 + FLOOR(RAND() * $ROWS);
      UPDATE garden.bed SET plant = MD5(RAND()) WHERE id = @id;
    END WHILE; END//" >/dev/null 2>&1 &
  writers+=("$!")
done

say "2. A donor beside it, with TLS, and a recipient"
make_certificates
password=demo-$$-$RANDOM$RANDOM
make_account demo "$password"
(umask 077 && echo "$database_password" >"$work/database-password")
tls=(--tls-cert "$work/tls/server.pem" --tls-key "$work/tls/server.key")
start donor "$bin/marcot-donor" --data-directory "$work/donor-data" --listen 127.0.0.1:0 \
  --engine innodb --database-socket "$sockets/donor-data.sock" --database-user marcot \
  --database-password-file "$work/database-password" --spool-directory "$work/spool" \
  --accounts "$work/accounts" "${tls[@]}"
donor=$address
start recipient "$bin/marcot-recipient" --listen 127.0.0.1:0 --state-directory "$work/state" \
  --allow-directory "$work" --ssl-ca "$work/tls/ca.pem" "${tls[@]}" \
  --donor-list "127.0.0.1:${donor##*:}"
recipient=$address

statement="CLONE INSTANCE FROM 'demo'@'127.0.0.1':${donor##*:} IDENTIFIED BY"
where="DATA DIRECTORY '$work/clone-data' REQUIRE SSL"
say "3. $statement '***' $where"
before=$(sql donor-data 'SELECT COUNT(*) FROM garden.book')
"$bin/marcot" --recipient "$recipient" --ca-file "$work/tls/ca.pem" \
  sql "$statement '$password' $where" | tee "$work/clone.out"
after=$(sql donor-data 'SELECT COUNT(*) FROM garden.book')
say "   meanwhile $((after - before)) rows were written"

say "4. A server on the clone: the stock one, by its ordinary crash recovery"
server clone-data 2 "${user[@]}" --skip-networking
if grep '\[ERROR\]' "$work/clone-data-server.log" >&2; then die "the clone's server has errors"; fi
say "   it holds $(sql clone-data 'SELECT COUNT(*) FROM garden.book') rows of the book"

say "5. Attached as a replica, as the clone's coordinates say"
gtid=$(sed -n "s/.*SET GLOBAL gtid_slave_pos = '\([^']*\)'.*/\1/p" "$work/clone.out" | head -1)
[[ -n $gtid ]] || die "no coordinates were printed"
sql clone-data "SET GLOBAL gtid_slave_pos = '$gtid';
  CHANGE MASTER TO MASTER_HOST = '127.0.0.1', MASTER_PORT = $port, MASTER_USER = 'replica',
    MASTER_PASSWORD = '$database_password', MASTER_USE_GTID = slave_pos; START SLAVE"
for pid in "${writers[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
# The server's own threads go on without their clients.
running="FROM information_schema.processlist WHERE user = 'writer'"
deadline=$((SECONDS + 30))
until [[ $(sql donor-data "SELECT COUNT(*) $running") == 0 ]]; do
  ((SECONDS < deadline)) || die "a writer does not end"
  sql donor-data "SELECT CONCAT('KILL ', id) $running" |
    while read -r kill; do sql donor-data "$kill" || true; done
done
position=$(sql donor-data 'SELECT @@gtid_binlog_pos')
waited=$(sql clone-data "SELECT MASTER_GTID_WAIT('$position', 60)")
[[ $waited == 0 ]] || die "the replica does not catch up: $(sql clone-data 'SHOW SLAVE STATUS')"
tables='garden.bed, garden.book'
own=$(sql clone-data "CHECKSUM TABLE $tables") theirs=$(sql donor-data "CHECKSUM TABLE $tables")
[[ $own == "$theirs" ]] || die "the tables differ: $own, $theirs"
say "   it has caught up: $(sql clone-data 'SELECT COUNT(*) FROM garden.book') rows, all the same"
stop_daemons || die "a daemon did not end"
stop_servers
servers=() writers=()
echo "demo: replica caught up"
