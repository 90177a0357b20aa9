#!/bin/sh
# A role and a database of its own for each part, at PostgreSQL's first start. Passwords are read
# by psql itself, so that they stand on no command line.
set -eu
for name in prefect mlflow routellm; do
  export FILE="${SECRETS:-/run/secrets}/database_$name"
  [ -s "$FILE" ] || { echo "databases.sh: $FILE is missing or empty" >&2; exit 1; }
  psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --set name="$name" \
    --username "${POSTGRES_USER:-postgres}" --dbname postgres <<'SQL'
\set password `cat "$FILE"`
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
