//! What packages are made with: a daemon's manual page, and completions for shells.

use std::io::{self, Write as _};

use clap::{Parser, ValueEnum as _};
use clap_complete::Shell;

/// Prints what `--man-page` or `--completions SHELL`, alone on the command line, ask for; says whether
/// it has. Neither is among the options: they are of no use to who runs a daemon.
pub(super) fn print<A: Parser>() -> bool {
    let arguments: Vec<String> = std::env::args().skip(1).take(3).collect();
    let Some(text) = page::<A>(&arguments) else { return false };
    // A reader that has gone away is no error.
    drop(io::stdout().write_all(&text));
    true
}

fn page<A: Parser>(arguments: &[String]) -> Option<Vec<u8>> {
    let mut command = A::command();
    let name = command.get_name().to_owned();
    let mut text = Vec::new();
    match arguments {
        [flag] if flag == "--man-page" => {
            clap_mangen::Man::new(command).section("8").render(&mut text).ok()?;
        }
        [flag, shell] if flag == "--completions" => {
            let shell = Shell::from_str(shell, true).ok()?;
            clap_complete::generate(shell, &mut command, name, &mut text);
        }
        _ => return None,
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Parser)]
    #[command(name = "marcot-something")]
    struct Settings {
        /// How many.
        #[arg(long)]
        count: Option<u32>,
    }

    fn of(arguments: &[&str]) -> Option<String> {
        let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        page::<Settings>(&arguments).map(|text| String::from_utf8(text).unwrap())
    }

    #[test]
    fn a_page_names_every_option_and_other_arguments_are_left_to_the_daemon() {
        assert!(of(&["--man-page"]).unwrap().contains("count"));
        assert!(of(&["--completions", "bash"]).unwrap().contains("--count"));
        assert_eq!(of(&["--completions", "cmd"]), None);
        assert_eq!(of(&["--count", "1"]), None);
        assert_eq!(of(&[]), None);
        assert_eq!(Settings::parse_from(["x", "--count", "1"]).count, Some(1));
    }
}
