#![no_main]

marcot_fuzz::fuzz!(mysql_redo);
