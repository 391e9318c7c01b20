//! The process itself, read from /proc when it is asked for; names as every Prometheus client has.

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

/// Tells what cannot be read by leaving it out: a scrape never fails for it.
#[derive(Debug)]
pub(super) struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let stat = Stat::read();
        if let Some(stat) = &stat {
            let help = "User and system CPU time.";
            let counter = ConstCounter::new(stat.cpu_seconds);
            let kind = counter.metric_type();
            counter.encode(encoder.encode_descriptor(
                "process_cpu",
                help,
                Some(&Unit::Seconds),
                kind,
            )?)?;
        }
        let mut gauge = |name: &str, help: &str, unit: Option<&Unit>, value: Option<f64>| {
            let Some(value) = value else { return Ok(()) };
            let gauge = ConstGauge::new(value);
            let kind = gauge.metric_type();
            gauge.encode(encoder.encode_descriptor(name, help, unit, kind)?)
        };
        let bytes = Some(&Unit::Bytes);
        let resident = stat.as_ref().map(|stat| stat.resident_bytes);
        gauge("process_resident_memory", "Resident memory.", bytes, resident)?;
        let virtual_bytes = stat.as_ref().map(|stat| stat.virtual_bytes);
        gauge("process_virtual_memory", "Size of the address space.", bytes, virtual_bytes)?;
        gauge("process_open_fds", "Open file descriptors.", None, open_files())?;
        gauge("process_max_fds", "Most file descriptors that may be open.", None, files_max())?;
        let start = stat.and_then(|stat| Some(boot_seconds()? + stat.start_seconds));
        let help = "Start of the process, in seconds since 1970.";
        gauge("process_start_time", help, Some(&Unit::Seconds), start)
    }
}

/// What proc_pid_stat(5) says of this process.
struct Stat {
    cpu_seconds: f64,
    /// Since the machine's start.
    start_seconds: f64,
    virtual_bytes: f64,
    resident_bytes: f64,
}

impl Stat {
    fn read() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/self/stat").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        // The name, the second field, may hold blanks and brackets; the third is the first here.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        let ticks = small(rustix::param::clock_ticks_per_second());
        Some(Self {
            cpu_seconds: (field(14)? + field(15)?) / ticks,
            start_seconds: field(22)? / ticks,
            virtual_bytes: field(23)?,
            resident_bytes: field(24)? * small(rustix::param::page_size() as u64),
        })
    }
}

/// When the machine started, in seconds since 1970.
fn boot_seconds() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

fn open_files() -> Option<f64> {
    // One of them is the directory being read.
    let count = fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1);
    Some(small(count as u64))
}

fn files_max() -> Option<f64> {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current.map(small)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53, where f64 is exact")]
fn small(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::SystemTime};

    use prometheus_client::{encoding::text::encode, registry::Registry};

    use super::*;

    fn sample(text: &str, name: &str) -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("{name} in {text}")).parse().unwrap()
    }

    #[test]
    fn values_are_those_of_this_process() {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Arc::new(ProcessCollector)));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        let resident = sample(&text, "process_resident_memory_bytes");
        assert!(resident > 1e5 && resident < sample(&text, "process_virtual_memory_bytes"));
        let open = sample(&text, "process_open_fds");
        assert!(open >= 3.0 && open <= sample(&text, "process_max_fds"));
        assert!(sample(&text, "process_cpu_seconds_total") >= 0.0);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - sample(&text, "process_start_time_seconds");
        assert!((-2.0..86_400.0).contains(&age), "{age}");
    }

    #[test]
    fn a_name_with_blanks_and_brackets_moves_no_field() {
        let fields: Vec<String> = (3..=52).map(|number: u32| number.to_string()).collect();
        let stat = Stat::parse(&format!("7 (a) b) {}", fields.join(" "))).unwrap();
        let ticks = small(rustix::param::clock_ticks_per_second());
        assert!((stat.cpu_seconds - 29.0 / ticks).abs() < 1e-9);
        assert!((stat.virtual_bytes - 23.0).abs() < 1e-9);
    }
}
